# Each optimizer at several learning rates, because optimizers must be compared at their best rates, not at one rate.
#     python research/sweep.py config/sweep/optimizer_lr.py
name = "optimizer_lr"
base = "config/quickstart.py --max_iters=300 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= --embedding_lr=0 --head_lr=0 --vector_lr=0"
axes = {"optimizer": ["adamw", "muon"], "learning_rate": [1e-3, 3e-3, 1e-2, 3e-2]}
seeds = [1, 2]
