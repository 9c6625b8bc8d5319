"""What a model is measured by: texts, tasks, comparisons, and the report of them."""
