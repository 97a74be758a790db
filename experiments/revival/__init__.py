"""What `relu_revival.py` is made of: cells, runs, results, and the page."""
