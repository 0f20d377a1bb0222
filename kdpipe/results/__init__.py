"""What a run measured: measures, verdict, completions, comparison and studies."""
