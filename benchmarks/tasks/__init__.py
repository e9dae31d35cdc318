"""The data and the models of the studies: texts, images and language."""
