# Attention: the number of heads, shared keys and values, QK-norm, and the explicit formula against the fused kernel.
#     python research/sweep.py config/sweep/attention.py
name = "attention"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
arms = {
    "4 heads": {},
    "1 head": {"n_head": 1},
    "8 heads": {"n_head": 8},
    "1 key/value head": {"n_kv_head": 1},
    "no qk_norm": {"qk_norm": False},
    "explicit formula": {"attn": "manual"},
}
