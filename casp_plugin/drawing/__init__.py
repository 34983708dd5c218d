"""Pictures of plans and of results, by matplotlib (the extra ``report``)."""
