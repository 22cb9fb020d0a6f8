"""Handlers of events that Delta brings: `webhook.Webhook` and `topic.Topic`, for `@pipeline.on(…)`.

to_shop = Webhook("https://shop.example/changes", secret="${env:HOOK_SECRET}")
movies.on("public.movie", name="shop", batch=100)(to_shop)
"""
