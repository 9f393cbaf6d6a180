set -u
t() { echo "== $SECONDS s: $*"; }
bash bench/gpu.sh first environment > $OUT/env.txt 2>&1; t env
export PYTHONPATH=/tmp/dat-serve-$UID:$PWD BENCH_COMMIT=$(cat .whl/commit) PYTHONUNBUFFERED=1
TUNE_S=68 TUNE_COMPILE_S=34 timeout 80 python3 tune_a.py cuda > $OUT/tune_a.log 2>&1; t tune_a; tail -30 $OUT/tune_a.log | cut -c1-230
TUNE_LIMIT=74 timeout 84 python3 tune_b.py > $OUT/tune_b.log 2>&1; t tune_b; tail -3 $OUT/tune_b.log
python3 tune_apply.py > $OUT/apply.log 2>&1; cat $OUT/apply.log
git() { :; }
timeout 45 python3 -m bench.graphs cuda --models dat_tiny_224 dat_pp_tiny_224 --ways "graph, kernels" engine --seconds 0.25 > $OUT/times.jsonl 2> $OUT/times.err; t times; grep '"ms"\|figure' $OUT/times.jsonl | cut -c1-160; tail -3 $OUT/times.err
for m in dat_tiny_224 dat_pp_tiny_224 dat_nano mask_rcnn_dat_pp_tiny; do OMP_NUM_THREADS=3 timeout 70 python3 -m bench.gpu_check $m cuda > $OUT/../check-$m.txt 2>&1 & done; wait; cat $OUT/../check-*.txt > $OUT/checks.txt; t checks; grep -h figure $OUT/checks.txt | grep -v '"figure": 0.0,\|"figure": 1.0' | cut -c1-170
timeout 50 python3 -m bench.server --device cuda --protocols http --max-batch 64 --concurrency 64 --rounds 1 --seconds 4 --engine-seconds 2 --fractions > $OUT/server.log 2>&1; t server; tail -12 $OUT/server.log | cut -c1-300; cp bench/results/server-*cuda*.json $OUT/ 2>/dev/null
