"""What is not one cell: landscapes and the paths on them, what a step costs, what a model is shown."""
