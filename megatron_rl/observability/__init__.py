"""What a run shows and records: metrics, rollout dumps, the terminal view, warnings, the report and the summary."""
