# Positions: rotary, learned, or none.
#     python research/sweep.py config/sweep/pos.py
name = "pos"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"pos": ["rope", "learned", "none"]}
