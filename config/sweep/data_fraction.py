# How much data is enough? All runs have the same number of steps, so a smaller part of the data is seen more often.
#     python research/sweep.py config/sweep/data_fraction.py
name = "data_fraction"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"data_fraction": [0.01, 0.03, 0.1, 0.3, 1.0]}
