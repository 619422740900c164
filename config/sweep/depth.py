# Loss against depth; then scaling.py --results=out/depth.
#     python research/sweep.py config/sweep/depth.py
name = "depth"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --n_embd=64"
axes = {"n_layer": [1, 2, 4, 8]}
