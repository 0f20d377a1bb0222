"""Names of the files that steps write. The columns of the tables are in `tables`.

Imports nothing: the commands name these files and start without pyarrow.
"""

ROLLOUTS_FILE = "rollouts.parquet"
SCORES_FILE = "scores.parquet"
HIDDEN_FILE = "hidden.safetensors"
COMPLETIONS_FILE = "completions.parquet"
GRADES_FILE = "grades.parquet"
REVERSE_KL_FILE = "reverse_kl.parquet"
SUMMARY_FILE = "summary.json"
