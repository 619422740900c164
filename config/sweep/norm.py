# LayerNorm against RMSNorm.
#     python research/sweep.py config/sweep/norm.py
name = "norm"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"norm": ["rmsnorm", "layernorm"]}
