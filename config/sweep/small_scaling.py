# A grid of widths and numbers of steps for L(N, D), on the synthetic stories: six minutes on two CPU cores.
#     python research/sweep.py config/sweep/small_scaling.py
name = "small_scaling"
base = (
    "config/quickstart.py --n_head=2 --final_eval_tokens=0 --sample_prompt= --eval_interval=0 "
    "--tie_weights=True --embedding_lr=0.01 --momentum=0.95 --schedule=linear"
)
axes = {"n_embd": [16, 32, 64, 128], "max_iters": [200, 400, 800, 1600]}
seeds = [1]
