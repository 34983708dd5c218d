"""Pictures of plans and of results."""
