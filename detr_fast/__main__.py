from detr_fast.cli import main

raise SystemExit(main())
