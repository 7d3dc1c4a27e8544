"""How a model is split over ranks: the layout, its process groups, and the nodes that the ranks run on."""
