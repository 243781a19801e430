"""What the README and the pages of docs/ say, held against what there is."""
