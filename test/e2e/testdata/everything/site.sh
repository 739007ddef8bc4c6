# Makes what the build finds on the web, in the working directory.
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
echo from the web > file.txt
tar cf archive.tar file.txt
mkdir work
cd work
git init -q -b main .
echo inner > inner
git add -A
git commit -qm one
git clone -q --bare . ../inner.git
inner=$(git rev-parse HEAD)
rm -rf .git inner
git init -q -b main .
mkdir sub
echo deep > sub/deep
echo one > top
printf '[submodule "inner"]\n\tpath = inner\n\turl = ../inner.git\n' > .gitmodules
git add -A
git update-index --add --cacheinfo "160000,$inner,inner"
git commit -qm one
git tag v1
echo two > top
git commit -qam two
git clone -q --bare . ../repo.git
cd ..
rm -rf work
