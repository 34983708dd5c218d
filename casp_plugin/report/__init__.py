"""Reports of a checkpoint for people: an HTML page and the model card, from the files in its folder
and those that ``casp eval`` and ``casp bench`` wrote."""
