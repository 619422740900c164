# One text with two tokenizers. Their losses per token are not comparable; evaluate.py's bits per byte are.
#
#     python prepare_text.py --input=my.txt --dataset=mine_char --tokenizer=char
#     python prepare_text.py --input=my.txt --dataset=mine_bpe --tokenizer=bpe --vocab_size=1024
#     python research/sweep.py config/sweep/tokenizer.py
#     python evaluate.py --checkpoints=out/tokenizer/runs
name = "tokenizer"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"dataset": ["mine_char", "mine_bpe"]}
