"""Text and questions about images, read from anywhere and made into batches."""
