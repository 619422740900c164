# A scaling law from start to end, in six minutes on two CPU cores: data, sweep, fits, figures, evaluation, export.
#     python research/pipeline.py config/pipeline/reproduce_small.py
name = "reproduce_small"
_study = "out/small_scaling"
steps = {
    "prepare": {
        "run": "prepare_tinystories.py --synthetic=True",
        "outputs": ["data/tinystories_synthetic/meta.json"],
    },
    "sweep": {
        "run": "research/sweep.py config/sweep/small_scaling.py --retry",
        "after": ["prepare"],
        "inputs": ["data/tinystories_synthetic/meta.json"],
        "outputs": [f"{_study}/results.jsonl"],
        "retries": 1,
    },
    "fit": {
        "run": f"research/scaling.py --results={_study}",
        "after": ["sweep"],
        "inputs": [f"{_study}/results.jsonl"],
        "outputs": [f"{_study}/scaling_laws.json"],
    },
    "plot": {
        "run": f"research/plot.py --results={_study} --curve=train_loss",
        "after": ["sweep"],
        "inputs": [f"{_study}/results.jsonl"],
        "outputs": [f"{_study}/comparison.png"],
    },
    "evaluate": {
        "run": f"evaluate.py --checkpoints={_study}/runs --output_dir={_study}/evaluation",
        "after": ["sweep"],
        "inputs": [f"{_study}/results.jsonl"],
        "outputs": [f"{_study}/evaluation/evaluation_results.csv"],
    },
    "export": {
        "run": f"export.py --out_dir={_study}/runs/n_embd=128_max_iters=1600-seed1 --output_format=torch --overwrite=True --output_dir={_study}/export",
        "after": ["sweep"],
        "inputs": [f"{_study}/results.jsonl"],
        "outputs": [f"{_study}/export"],
    },
}
