"""How a model is split over ranks: the layout, its process groups, and where the ranks run."""
