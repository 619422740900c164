# Loss against context length, at equal tokens per step; then scaling.py --results=out/context.
#     python research/sweep.py config/sweep/context.py
name = "context"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --total_batch_tokens=2048"
zipped = {"block_size": [32, 64, 128, 256], "batch_size": [64, 32, 16, 8]}
