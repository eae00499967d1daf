//! Who waits for whom? Nodes, what each waits for, and the one question asked of them: may X wait for Y?
//!
//! A write to an origin under a copy waits for its store. If the store, by whatever road, waits for a write to the
//! origin, both wait for good: nothing can let the origin go then, for the kernel lets nobody cancel a bio. So the
//! question is asked before the store gets its place in the origin's way, and whoever cannot be looked through counts
//! as the worst.
//!
//! Pure: what a node waits for is told by whoever observes ([`observe`](super::observe)). Only what can be reached
//! is asked for, so that nobody has to look at a file system that has nothing to do with the question. Invariants:
//! - an answer of [`Answer::No`] means that everything that can be reached was looked at, but for what Y stands on;
//! - what Y stands on does not wait for Y, or Y would wait for itself: there an Unknown or another machine adds nothing.
//!   So an Unknown has to name the one thing that it is, and two are the same only where that is the same;
//! - a road is given from its first node to its last, each waiting for the next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::base::DeviceNumber;

/// Nodes looked at for one question at most; beyond it the answer is [`Answer::Unknown`].
const NODES_MAX: usize = 16_384;

/// Something that I/O may wait for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Node {
    /// A block device.
    Device(DeviceNumber),
    /// A file system: its superblock's number, as `st_dev` of most and in mountinfo.
    FileSystem(DeviceNumber),
    /// Memory that has to be found, for which the kernel may have to write to swap space.
    Memory,
    /// Another machine, which may not answer; by what it is reached.
    Network(String),
    /// What it waits for cannot be told; why.
    Unknown(String),
}

/// From the node that waits to the one that is waited for.
pub type Road = Vec<Node>;

/// May X wait for Y?
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It does not: all that it waits for is known, on this machine and apart from Y.
    No,
    /// It may, by this road.
    Yes(Road),
    /// Nobody knows: the road ends at what cannot be looked through.
    Unknown(Road),
    /// Not for Y; but for another machine, which Y does without.
    Network(Road),
}

/// May `from` wait for `to`? `waits_for` tells what a node waits for directly. What is in `past` is not followed.
pub fn may_wait(
    from: &Node,
    to: &Node,
    past: &[Node],
    waits_for: &mut dyn FnMut(&Node) -> BTreeSet<Node>,
) -> Answer {
    let roads = Roads::explore(from, past, waits_for);
    if roads.came_from.contains_key(to) {
        return Answer::Yes(roads.to(to));
    }
    if roads.is_cut_short {
        let end = Node::Unknown(format!("more than {NODES_MAX} devices"));
        return Answer::Unknown(vec![from.clone(), end]);
    }
    let ends: Vec<&Node> =
        roads.order.iter().filter(|node| matches!(node, Node::Unknown(_) | Node::Network(_))).collect();
    if ends.is_empty() {
        return Answer::No;
    }
    // What the target stands on anyway makes it hang no more than it does.
    let beneath = Roads::explore(to, past, waits_for);
    let mut ends = ends.into_iter().filter(|node| !beneath.came_from.contains_key(node)).peekable();
    let nearest = ends.peek().copied();
    match ends.find(|node| matches!(node, Node::Unknown(_))) {
        Some(unknown) => Answer::Unknown(roads.to(unknown)),
        None => nearest.map_or(Answer::No, |network| Answer::Network(roads.to(network))),
    }
}

/// Everything that can be reached from a node, each with who waits for it; the nearest first.
struct Roads {
    came_from: BTreeMap<Node, Option<Node>>,
    order: Vec<Node>,
    is_cut_short: bool,
}

impl Roads {
    fn explore(from: &Node, past: &[Node], waits_for: &mut dyn FnMut(&Node) -> BTreeSet<Node>) -> Self {
        let mut came_from = BTreeMap::from([(from.clone(), None)]);
        let (mut order, mut open) = (Vec::new(), VecDeque::from([from.clone()]));
        let mut is_cut_short = false;
        while let Some(node) = open.pop_front() {
            for next in waits_for(&node) {
                if past.contains(&next) || came_from.contains_key(&next) {
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

    fn to(&self, end: &Node) -> Road {
        let mut road = vec![end.clone()];
        let mut at = end;
        while let Some(Some(before)) = self.came_from.get(at) {
            road.push(before.clone());
            at = before;
        }
        road.reverse();
        road
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

    fn ask(edges: &Edges, from: &Node, to: &Node, past: &[Node]) -> Answer {
        may_wait(from, to, past, &mut |node| edges.get(node).cloned().unwrap_or_default())
    }

    /// Of every pair, by closing the relation until nothing is added: slow, and plain to see.
    fn closure(edges: &Edges, past: &[Node]) -> BTreeSet<(Node, Node)> {
        let direct = edges.iter().flat_map(|(from, to)| to.iter().map(move |to| (from.clone(), to.clone())));
        let mut pairs: BTreeSet<(Node, Node)> = direct.filter(|(_, to)| !past.contains(to)).collect();
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
                // These are where knowledge ends.
                if !matches!(from, Node::Network(_) | Node::Unknown(_)) {
                    edges.entry(from).or_default().insert(to);
                }
            }
            edges
        })
    }

    proptest! {
        #[test]
        fn the_answer_is_that_of_the_relation_closed(
            edges in graphs(),
            from in nodes(),
            to in nodes(),
            past_memory in any::<bool>(),
        ) {
            let past: &[Node] = if past_memory { &[Node::Memory] } else { &[] };
            let pairs = closure(&edges, past);
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
            let (found, road) = match ask(&edges, &from, &to, past) {
                Answer::No => ("no", None),
                Answer::Yes(road) => {
                    prop_assert_eq!(road.last(), Some(&to));
                    ("yes", Some(road))
                }
                Answer::Unknown(road) => ("unknown", Some(road)),
                Answer::Network(road) => ("network", Some(road)),
            };
            prop_assert_eq!(found, expected);
            if let Some(road) = road {
                prop_assert_eq!(&road[0], &from);
                for pair in road.windows(2) {
                    prop_assert!(edges[&pair[0]].contains(&pair[1]), "{:?} does not wait for {:?}", pair[0], pair[1]);
                    prop_assert!(!past.contains(&pair[1]));
                }
            }
        }
    }

    #[test]
    fn a_store_on_an_origin_whose_store_is_on_ours_closes_the_circle() {
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
    fn what_the_origin_stands_on_does_not_wait_for_it() {
        let unknown = |name: &str| BTreeSet::from([Node::Unknown(name.to_owned())]);
        let mut edges = Edges::from([(device(1), unknown("/dev/foo1"))]);
        assert!(matches!(ask(&edges, &device(1), &device(0), &[]), Answer::Unknown(_)));
        edges.insert(device(0), unknown("/dev/foo0"));
        assert!(matches!(ask(&edges, &device(1), &device(0), &[]), Answer::Unknown(_)), "another one");
        edges.insert(device(0), unknown("/dev/foo1"));
        assert_eq!(ask(&edges, &device(1), &device(0), &[]), Answer::No);
    }

    #[test]
    fn a_network_that_the_origin_hangs_on_itself_adds_nothing() {
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
    fn more_than_can_be_looked_at_is_not_known() {
        let mut endless = |node: &Node| match node {
            Node::Device(number) => BTreeSet::from([device(number.minor + 1)]),
            _ => BTreeSet::new(),
        };
        let answer = may_wait(&device(1), &device(0), &[], &mut endless);
        assert!(matches!(answer, Answer::Unknown(_)), "{answer:?}");
    }
}
