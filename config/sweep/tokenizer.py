# One text cut in two ways. Losses a token of different tokenizers do not compare: look at evaluate.py's bits a byte.
#
#     python prepare_text.py --input=my.txt --dataset=mine_char --tokenizer=char
#     python prepare_text.py --input=my.txt --dataset=mine_bpe --tokenizer=bpe --vocab_size=1024
#     python research/sweep.py config/sweep/tokenizer.py
#     python evaluate.py --checkpoints=out/tokenizer/runs
name = "tokenizer"
base = "config/quickstart.py --max_iters=400 --eval_interval=50 --final_eval_tokens=0 --sample_prompt="
axes = {"dataset": ["mine_char", "mine_bpe"]}
