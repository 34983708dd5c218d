"""How large, fast and hungry for memory a checkpoint is, beside another one in the same run."""
