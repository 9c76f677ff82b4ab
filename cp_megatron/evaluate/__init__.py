"""Evaluates a trained model on long rows: the program ``launch/evaluate.py``.

check_evaluation.py   checks the flags and the checkpoint, without torch -> EvaluationSetup
run_evaluation.py     loads the model, makes the rows and scores them -> EvaluationResults
  needle.py           makes the questions: a needle in a text, a chain of variables
  score.py            scores rows on any grid of ranks
results.py            prints the tables, writes results.json and the pictures
"""
