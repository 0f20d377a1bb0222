"""Names of the files that steps write; `tables` has the columns of those that are tables. Imports nothing heavy."""

ROLLOUTS_FILE = "rollouts.parquet"
SCORES_FILE = "scores.parquet"
HIDDEN_FILE = "hidden.safetensors"
COMPLETIONS_FILE = "completions.parquet"
GRADES_FILE = "grades.parquet"
REVERSE_KL_FILE = "reverse_kl.parquet"
SUMMARY_FILE = "summary.json"
