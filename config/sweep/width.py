# Loss against width; then scaling.py --results=out/width.
#     python research/sweep.py config/sweep/width.py
name = "width"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --n_head=2"
axes = {"n_embd": [16, 32, 64, 128]}
