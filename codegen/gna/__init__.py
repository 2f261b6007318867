"""Windows, tiles and masks of Generalized Neighborhood Attention in NumPy, and pictures of them."""
