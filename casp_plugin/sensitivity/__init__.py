"""Which parts of a model can take fewer bits: a grid of quantized models, and what it tells.

After "Towards Understanding Best Practices for Quantization of Vision-Language Models"
(arXiv 2601.15287)."""
