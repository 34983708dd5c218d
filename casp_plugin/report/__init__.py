"""What a checkpoint is, for people: one HTML page and the model card, from the files beside it and
from what ``casp eval`` and ``casp bench`` wrote."""
