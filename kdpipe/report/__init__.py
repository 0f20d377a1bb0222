"""What a run left, for reading: one page of HTML, and completions token by token. Reads artifacts only, never torch."""
