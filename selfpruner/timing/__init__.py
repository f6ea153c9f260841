"""Speed side by side: models in turn on one device, their ratios, and the bound of each ratio."""
