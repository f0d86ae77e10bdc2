"""What is wrong with the nodes: facts and measurements of each, compared. facts needs no torch."""
