"""Generates text with a trained model on one rank: the program ``launch/generate.py``.

check_generation.py   checks the flags and the checkpoint, without torch -> GenerationSetup
run_generation.py     loads the model and answers the prompt, or each line of the input
  decode.py           generates tokens, greedily or by sampling
  key_value_cache.py  keeps the keys and values of earlier tokens
  dialogue.py         turns tokens into printed text, and input lines into questions
"""
