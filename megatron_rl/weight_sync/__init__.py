"""How an engine gets the actor's weights: one file a transport."""
