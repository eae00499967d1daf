//! A graph of what waits for what, and one query: whether X may wait for Y.
//!
//! During a copy a write to the origin waits for the store. If the store waits for a write to the origin,
//! over any path, both wait forever, and nothing can resume the origin, as the kernel cannot cancel a bio. So
//! the question is asked before the store is attached to the origin, and a node whose dependencies are hidden
//! counts as the worst case.
//!
//! Pure: the caller supplies what a node waits for ([`observe`](super::observe)). Only reachable nodes are
//! queried, so an unrelated file system is never examined. Invariants:
//! - [`Answer::No`] means that every reachable node was examined, except those below Y.
//! - What is below Y does not wait for Y, or Y would wait for itself. So an Unknown or another machine below
//!   Y adds no risk. An Unknown must therefore name the one thing it stands for: two Unknowns are equal only
//!   if that is the same.
//! - A path is listed from its first node to its last; each node waits for the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::base::DeviceNumber;

/// Most nodes examined for one question; beyond it the answer is [`Answer::Unknown`].
const NODES_MAX: usize = 16_384;

/// Something that I/O may wait for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A block device.
    Device(DeviceNumber),
    /// A file system: the number of its superblock, as in mountinfo, and in `st_dev` for most.
    FileSystem(DeviceNumber),
    /// Memory to be allocated, for which the kernel may have to write to swap space.
    Memory,
    /// Another machine, which may not answer; the text says how it is reached.
    Network(String),
    /// What it waits for is not known; the text says why.
    Unknown(String),
}

/// From the waiting node to the node that it waits for.
pub type WaitPath = Vec<Node>;

/// The answer to the query whether X may wait for Y.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// No: all that it waits for is known, is on this machine, and does not include Y.
    No,
    /// Yes, over this path.
    Yes(WaitPath),
    /// Not known: the path ends at a node whose dependencies are hidden.
    Unknown(WaitPath),
    /// Not for Y, but for another machine, which Y does not depend on.
    Network(WaitPath),
}

/// May `from` wait for `to`? `waits_for` returns what a node waits for directly. Nodes in `excluded` are not
/// followed.
pub fn may_wait(
    from: &Node,
    to: &Node,
    excluded: &[Node],
    waits_for: &mut dyn FnMut(&Node) -> BTreeSet<Node>,
) -> Answer {
    let reachable = Reachable::explore(from, excluded, waits_for);
    if reachable.came_from.contains_key(to) {
        return Answer::Yes(reachable.to(to));
    }
    if reachable.is_cut_short {
        let end = Node::Unknown(format!("more than {NODES_MAX} devices"));
        return Answer::Unknown(vec![from.clone(), end]);
    }
    let ends: Vec<&Node> =
        reachable.order.iter().filter(|node| matches!(node, Node::Unknown(_) | Node::Network(_))).collect();
    if ends.is_empty() {
        return Answer::No;
    }
    // A wait that the target depends on anyway adds no risk.
    let beneath = Reachable::explore(to, excluded, waits_for);
    let mut ends = ends.into_iter().filter(|node| !beneath.came_from.contains_key(node)).peekable();
    let nearest = ends.peek().copied();
    match ends.find(|node| matches!(node, Node::Unknown(_))) {
        Some(unknown) => Answer::Unknown(reachable.to(unknown)),
        None => nearest.map_or(Answer::No, |network| Answer::Network(reachable.to(network))),
    }
}

/// All nodes that a node can reach, nearest first, each with the node that waits for it.
struct Reachable {
    came_from: BTreeMap<Node, Option<Node>>,
    order: Vec<Node>,
    is_cut_short: bool,
}

impl Reachable {
    fn explore(from: &Node, excluded: &[Node], waits_for: &mut dyn FnMut(&Node) -> BTreeSet<Node>) -> Self {
        let mut came_from = BTreeMap::from([(from.clone(), None)]);
        let (mut order, mut open) = (Vec::new(), VecDeque::from([from.clone()]));
        let mut is_cut_short = false;
        while let Some(node) = open.pop_front() {
            for next in waits_for(&node) {
                if excluded.contains(&next) || came_from.contains_key(&next) {
                    continue;
                }
                if came_from.len() >= NODES_MAX {
                    is_cut_short = true;
                    continue;
                }
                came_from.insert(next.clone(), Some(node.clone()));
                open.push_back(next);
            }
            order.push(node);
        }
        Self { came_from, order, is_cut_short }
    }

    fn to(&self, end: &Node) -> WaitPath {
        let mut path = vec![end.clone()];
        let mut at = end;
        while let Some(Some(before)) = self.came_from.get(at) {
            path.push(before.clone());
            at = before;
        }
        path.reverse();
        path
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Edges = BTreeMap<Node, BTreeSet<Node>>;

    fn device(minor: u32) -> Node {
        Node::Device(DeviceNumber { major: 253, minor })
    }

    fn ask(edges: &Edges, from: &Node, to: &Node, excluded: &[Node]) -> Answer {
        may_wait(from, to, excluded, &mut |node| edges.get(node).cloned().unwrap_or_default())
    }

    /// All pairs of the transitive closure: slow but obvious.
    fn closure(edges: &Edges, excluded: &[Node]) -> BTreeSet<(Node, Node)> {
        let direct = edges.iter().flat_map(|(from, to)| to.iter().map(move |to| (from.clone(), to.clone())));
        let mut pairs: BTreeSet<(Node, Node)> = direct.filter(|(_, to)| !excluded.contains(to)).collect();
        loop {
            let found: Vec<(Node, Node)> = pairs
                .iter()
                .flat_map(|(a, b)| {
                    pairs.iter().filter(move |(c, _)| c == b).map(move |(_, d)| (a.clone(), d.clone()))
                })
                .filter(|pair| !pairs.contains(pair))
                .collect();
            if found.is_empty() {
                return pairs;
            }
            pairs.extend(found);
        }
    }

    fn nodes() -> impl Strategy<Value = Node> {
        prop_oneof![
            6 => (0u32..7).prop_map(device),
            3 => (0u32..3).prop_map(|minor| Node::FileSystem(DeviceNumber { major: 0, minor })),
            1 => Just(Node::Memory),
            1 => (0u32..2).prop_map(|number| Node::Network(format!("n{number}"))),
            1 => (0u32..2).prop_map(|number| Node::Unknown(format!("u{number}"))),
        ]
    }

    fn graphs() -> impl Strategy<Value = Edges> {
        prop::collection::vec((nodes(), nodes()), 0..16).prop_map(|pairs| {
            let mut edges = Edges::new();
            for (from, to) in pairs {
                // These nodes have no known dependencies.
                if !matches!(from, Node::Network(_) | Node::Unknown(_)) {
                    edges.entry(from).or_default().insert(to);
                }
            }
            edges
        })
    }

    proptest! {
        #[test]
        fn the_answer_agrees_with_the_transitive_closure(
            edges in graphs(),
            from in nodes(),
            to in nodes(),
            excluded_memory in any::<bool>(),
        ) {
            let excluded: &[Node] = if excluded_memory { &[Node::Memory] } else { &[] };
            let pairs = closure(&edges, excluded);
            let reaches = |a: &Node, b: &Node| a == b || pairs.contains(&(a.clone(), b.clone()));
            let all: BTreeSet<&Node> = edges.iter().flat_map(|(from, to)| to.iter().chain([from])).chain([&from]).collect();
            let any = |test: &dyn Fn(&Node) -> bool| all.iter().any(|node| reaches(&from, node) && test(node));
            let expected = if reaches(&from, &to) {
                "yes"
            } else if any(&|node| matches!(node, Node::Unknown(_)) && !reaches(&to, node)) {
                "unknown"
            } else if any(&|node| matches!(node, Node::Network(_)) && !reaches(&to, node)) {
                "network"
            } else {
                "no"
            };
            let (found, path) = match ask(&edges, &from, &to, excluded) {
                Answer::No => ("no", None),
                Answer::Yes(path) => {
                    prop_assert_eq!(path.last(), Some(&to));
                    ("yes", Some(path))
                }
                Answer::Unknown(path) => ("unknown", Some(path)),
                Answer::Network(path) => ("network", Some(path)),
            };
            prop_assert_eq!(found, expected);
            if let Some(path) = path {
                prop_assert_eq!(&path[0], &from);
                for pair in path.windows(2) {
                    prop_assert!(edges[&pair[0]].contains(&pair[1]), "{:?} does not wait for {:?}", pair[0], pair[1]);
                    prop_assert!(!excluded.contains(&pair[1]));
                }
            }
        }
    }

    #[test]
    fn two_stores_on_each_others_origins_are_found_as_a_circle() {
        let on = |minor| Node::FileSystem(DeviceNumber { major: 253, minor });
        let mut edges =
            Edges::from([(on(0), BTreeSet::from([device(0)])), (on(1), BTreeSet::from([device(1)]))]);
        assert_eq!(ask(&edges, &on(1), &device(0), &[]), Answer::No);
        // The other copy's store is on our file system.
        edges.insert(device(1), BTreeSet::from([on(0)]));
        assert_eq!(
            ask(&edges, &on(1), &device(0), &[]),
            Answer::Yes(vec![on(1), device(1), on(0), device(0)])
        );
    }

    #[test]
    fn what_is_below_the_origin_does_not_wait_for_it() {
        let unknown = |name: &str| BTreeSet::from([Node::Unknown(name.to_owned())]);
        let mut edges = Edges::from([(device(1), unknown("/dev/foo1"))]);
        assert!(matches!(ask(&edges, &device(1), &device(0), &[]), Answer::Unknown(_)));
        edges.insert(device(0), unknown("/dev/foo0"));
        assert!(
            matches!(ask(&edges, &device(1), &device(0), &[]), Answer::Unknown(_)),
            "a different Unknown"
        );
        edges.insert(device(0), unknown("/dev/foo1"));
        assert_eq!(ask(&edges, &device(1), &device(0), &[]), Answer::No);
    }

    #[test]
    fn a_network_below_the_origin_itself_does_not_count() {
        let network = Node::Network("rbd".to_owned());
        let mut edges = Edges::from([(device(1), BTreeSet::from([network.clone()]))]);
        assert_eq!(
            ask(&edges, &device(1), &device(0), &[]),
            Answer::Network(vec![device(1), network.clone()])
        );
        edges.insert(device(0), BTreeSet::from([network]));
        assert_eq!(ask(&edges, &device(1), &device(0), &[]), Answer::No);
    }

    #[test]
    fn a_graph_beyond_the_limit_is_unknown() {
        let mut endless = |node: &Node| match node {
            Node::Device(number) => BTreeSet::from([device(number.minor + 1)]),
            _ => BTreeSet::new(),
        };
        let answer = may_wait(&device(1), &device(0), &[], &mut endless);
        assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    }
}
