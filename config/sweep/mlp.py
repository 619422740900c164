# Activation of the MLP, at equal parameters: SwiGLU has three matrices, so its width is two thirds.
#     python research/sweep.py config/sweep/mlp.py
name = "mlp"
base = (
    "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt= "
    "--tie_weights=True --embedding_lr=0.01 --momentum=0.95 --schedule=linear"
)
axes = {"mlp": ["relu2", "gelu", "swiglu"]}
