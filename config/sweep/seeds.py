# The spread over seeds: one model, eight seeds. A difference between arms has to be larger than this spread.
#     python research/sweep.py config/sweep/seeds.py
name = "seeds"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
seeds = [1, 2, 3, 4, 5, 6, 7, 8]
