"""What a run shows and leaves behind: metrics, rollout dumps, the terminal view, the report and the closing summary."""
