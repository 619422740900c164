# One text with two tokenizers, from prepare_text.py: mine_char (--tokenizer=char) and mine_bpe (--tokenizer=bpe).
# Their losses per token are not comparable; evaluate.py's bits per byte are.
#     python research/sweep.py config/sweep/tokenizer.py
name = "tokenizer"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"dataset": ["mine_char", "mine_bpe"]}
