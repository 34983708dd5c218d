"""Sensitivity of a model's parts to quantization, from the scores of a grid of quantized models.

After "Towards Understanding Best Practices for Quantization of Vision-Language Models"
(arXiv 2601.15287)."""
