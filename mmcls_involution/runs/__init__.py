"""What trainings and tests leave: records, logs, reports, comparisons of seeds."""
