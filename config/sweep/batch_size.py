# Batch size at equal training tokens: many small steps, or few large ones?
#     python research/sweep.py config/sweep/batch_size.py
name = "batch_size"
base = (
    "config/quickstart.py --eval_interval=50 --final_eval_tokens=0 --sample_prompt= "
    "--tie_weights=True --embedding_lr=0.01 --momentum=0.95 --schedule=linear"
)
zipped = {"batch_size": [2, 4, 8, 16, 32], "max_iters": [1600, 800, 400, 200, 100], "warmup_iters": [80, 40, 20, 10, 5]}
seeds = [1, 2]
