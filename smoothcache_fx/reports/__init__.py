"""What a user looks at: explain, report, predictions, timings, comparisons."""
