"""How a run is laid out: phases, batches, its length and the learning rate; pure arithmetic."""
