"""ViT-Slim's parts: masks that train, what they keep, what that costs, and the smaller network."""
