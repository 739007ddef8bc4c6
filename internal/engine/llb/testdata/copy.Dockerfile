FROM scratch
COPY a b /dst/
COPY --chown=1:2 --chmod=0750 dir /dir
COPY --exclude=*.md . /all
ADD app.tar /app
