"""Texts and questions about images, read from files and the hub and made into batches."""
