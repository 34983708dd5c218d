"""What every width and rank on offer would cost a layer, in bytes and in error."""
